/** What the page carries, as `genmed/comparison.py` packs it, and back to arrays. */

export type Vector = [number, number, number];

export interface Packed {
  vertices: number;
  triangles: number;
  classes: boolean;
  data: string;
}

export interface Scene {
  /** Corner of the common box, mm, and the step of the 16 bit positions in it. */
  origin: Vector;
  step: number;
  size: Vector;
  colours: string[];
  columns: Packed[];
  ghost: Packed | null;
  /** Corners of the cutting planes, mm, going round. */
  planes: Vector[][];
}

/** `positions` (n, 3) in steps from the origin, `classes` (n), `triangles` (m, 3), `normals` (n, 3) of length 127. */
export interface Mesh {
  positions: Uint16Array;
  normals: Int8Array;
  classes: Uint8Array;
  triangles: Uint32Array;
}

export const PLAIN = 255;

export async function unpack(packed: Packed): Promise<Mesh> {
  const bytes = await inflate(packed.data);
  const cut = 6 * packed.vertices;
  const end = cut + 12 * packed.triangles;
  const positions = Uint16Array.from(summed(bytes.subarray(0, cut), 2, 0xffff));
  const triangles = summed(bytes.subarray(cut, end), 4, 0xffffffff);
  const classes = packed.classes ? bytes.slice(end) : new Uint8Array(packed.vertices).fill(PLAIN);
  return { positions, triangles, classes, normals: normals(positions, triangles) };
}

async function inflate(text: string): Promise<Uint8Array<ArrayBuffer>> {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** (n, 3) numbers from their differences along n: byte planes, low bytes first, each (3, n). */
function summed(bytes: Uint8Array, width: number, mask: number): Uint32Array {
  const total = bytes.length / width;
  const rows = total / 3;
  const out = new Uint32Array(total);
  for (let axis = 0; axis < 3; axis++) {
    let value = 0;
    for (let row = 0; row < rows; row++) {
      let difference = 0;
      for (let byte = 0; byte < width; byte++) {
        difference |= bytes[byte * total + axis * rows + row]! << (8 * byte);
      }
      value = (value + difference) & mask;
      out[3 * row + axis] = value;
    }
  }
  return out;
}

/** Normals of the vertices: the sum of those of their triangles, weighted by area. */
function normals(positions: Uint16Array, triangles: Uint32Array): Int8Array {
  const sums = new Float32Array(positions.length);
  for (let t = 0; t < triangles.length; t += 3) {
    const corners = [3 * triangles[t]!, 3 * triangles[t + 1]!, 3 * triangles[t + 2]!] as const;
    const [a, b, c] = corners.map((i) => [positions[i]!, positions[i + 1]!, positions[i + 2]!] as Vector);
    const normal = cross(minus(b!, a!), minus(c!, a!));
    for (const corner of corners) for (let k = 0; k < 3; k++) sums[corner + k]! += normal[k]!;
  }
  const out = new Int8Array(positions.length);
  for (let i = 0; i < sums.length; i += 3) {
    const length = Math.hypot(sums[i]!, sums[i + 1]!, sums[i + 2]!) || 1;
    for (let k = 0; k < 3; k++) out[i + k] = Math.round((127 * sums[i + k]!) / length);
  }
  return out;
}

export function minus(a: Vector, b: Vector): Vector {
  return [a[0] - b[0], a[1] - b[1], a[2] - b[2]];
}

export function cross(a: Vector, b: Vector): Vector {
  return [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]];
}

export function dot(a: Vector, b: Vector): number {
  return a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
}
