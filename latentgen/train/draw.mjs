// Draws SVGs with resvg. In: one JSON line per icon, {"row": n, "svg": "...", "size": px}. Out, per icon: row and byte count as
// little-endian uint32, then premultiplied RGBA. Zero bytes mean the icon could not be drawn. Some files abort the process:
// the reader then starts a new one past them.
import { createRequire } from 'node:module';
import { createInterface } from 'node:readline';
import { writeSync } from 'node:fs';
const { Resvg } = createRequire(process.cwd() + '/')('@resvg/resvg-js');
function put(buffer) {
  for (let at = 0; at < buffer.length;) {
    try { at += writeSync(1, buffer, at); } catch (e) { if (e.code !== 'EAGAIN') throw e; }
  }
}
for await (const line of createInterface({ input: process.stdin })) {
  const { row, svg, size } = JSON.parse(line);
  let pixels = Buffer.alloc(0);
  try {
    const image = new Resvg(svg, { fitTo: { mode: 'width', value: size }, font: { loadSystemFonts: false } }).render();
    if (image.width === size && image.height === size) pixels = image.pixels;
  } catch { /* reported as zero bytes */ }
  const head = Buffer.alloc(8);
  head.writeUInt32LE(row, 0);
  head.writeUInt32LE(pixels.length, 4);
  put(head);
  put(pixels);
}
