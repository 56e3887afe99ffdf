/** Which tokens of two texts differ: all that are not part of their longest common subsequence. Knows ids alone. */

const MOST_CELLS = 16_000_000; // of the table; beyond it, what differs is all between the common start and end

/**
 * @param {number[]} ours
 * @param {number[]} theirs
 * @returns {[number[], number[]]} the indices that are in one text alone
 */
export function differences(ours, theirs) {
  let start = 0;
  while (start < Math.min(ours.length, theirs.length) && ours[start] === theirs[start]) start += 1;
  let end = 0;
  const room = Math.min(ours.length, theirs.length) - start;
  while (end < room && ours[ours.length - 1 - end] === theirs[theirs.length - 1 - end]) end += 1;
  const [left, right] = [ours.slice(start, ours.length - end), theirs.slice(start, theirs.length - end)];
  const [kept, keptToo] =
    left.length * right.length > MOST_CELLS ? [new Set(), new Set()] : commonSubsequence(left, right);
  const without = (/** @type {number[]} */ ids, /** @type {Set<number>} */ common) =>
    ids.map((_, index) => index).filter((index) => !common.has(index)).map((index) => start + index);
  return [without(left, kept), without(right, keptToo)];
}

/**
 * @param {number[]} left
 * @param {number[]} right
 * @returns {[Set<number>, Set<number>]} the indices of one longest common subsequence
 */
function commonSubsequence(left, right) {
  const width = right.length + 1;
  const length = new Uint16Array((left.length + 1) * width); // of what follows from there on
  for (let i = left.length - 1; i >= 0; i -= 1) {
    for (let j = right.length - 1; j >= 0; j -= 1) {
      const [skipOurs, skipTheirs] = [length[(i + 1) * width + j], length[i * width + j + 1]];
      length[i * width + j] =
        left[i] === right[j] ? length[(i + 1) * width + j + 1] + 1 : Math.max(skipOurs, skipTheirs);
    }
  }
  /** @type {[Set<number>, Set<number>]} */
  const kept = [new Set(), new Set()];
  for (let i = 0, j = 0; i < left.length && j < right.length; ) {
    if (left[i] === right[j]) {
      kept[0].add(i++);
      kept[1].add(j++);
    } else if (length[(i + 1) * width + j] >= length[i * width + j + 1]) i += 1;
    else j += 1;
  }
  return kept;
}
