/** Reads the .npy arrays that the API sends as base64. */

/**
 * @param {string} base64  of a little-endian float32 array in C order
 * @returns {{shape: number[], data: Float32Array}}
 */
export function decodeNpy(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  const [lengthBytes, start] = bytes[6] === 1 ? [2, 10] : [4, 12];
  const length = lengthBytes === 2 ? view.getUint16(8, true) : view.getUint32(8, true);
  const header = new TextDecoder("latin1").decode(bytes.subarray(start, start + length));
  if (!header.includes("'<f4'") || !header.includes("'fortran_order': False")) {
    throw new Error(`an array of another kind than float32 in C order: ${header.trim()}`);
  }
  const shape = /'shape': \(([^)]*)\)/.exec(header)?.[1] ?? "";
  return {
    shape: shape
      .split(",")
      .filter((part) => part.trim())
      .map(Number),
    data: new Float32Array(bytes.buffer.slice(start + length)),
  };
}
