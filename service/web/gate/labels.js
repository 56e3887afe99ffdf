/** Short names that stay apart, for axes and bars where long ones would be cut to the same beginning. */

const MOST = 16; // characters

/**
 * @param {string[]} names
 * @param {number} [most]  characters of the longest
 * @returns {string[]} as given where they fit; else without what all share, then without their middle
 */
export function shortNames(names, most = MOST) {
  if (names.every((name) => name.length <= most)) return names;
  const start = sharedStart(names);
  const end = sharedStart(names.map((name) => [...name.slice(start)].reverse().join("")));
  const own = names.map((name) => name.slice(start, name.length - end) || name);
  const cut = own.map((name) => (name.length <= most ? name : withoutMiddle(name, most)));
  return cut.map((name, index) => (cut.indexOf(name) === cut.lastIndexOf(name) ? name : `${index + 1} ${name}`));
}

/**
 * @param {string[]} names
 * @returns {number} characters that all begin with, up to a whole word; 0 for a single name
 */
function sharedStart(names) {
  if (names.length < 2) return 0;
  let length = 0;
  while (names.every((name) => length < name.length - 1 && name[length] === names[0][length])) length += 1;
  while (length > 0 && !/[-_./ ]/.test(names[0][length - 1])) length -= 1;
  return length;
}

/**
 * @param {string} name
 * @param {number} most
 */
function withoutMiddle(name, most) {
  const half = Math.floor((most - 1) / 2);
  return `${name.slice(0, most - 1 - half)}…${name.slice(-half)}`;
}
