// What files hold beside pixels: reads EXIF and colour profile from one, writes them into another.

const textOf = (bytes) => String.fromCharCode(...bytes);
const bigEndian = (value, size) =>
  new Uint8Array([24, 16, 8, 0].slice(-size).map((bits) => value >> bits));
const joined = async (...parts) => new Uint8Array(await new Blob(parts).arrayBuffer());
const piped = async (bytes, stream) =>
  joined(await new Response(new Blob([bytes]).stream().pipeThrough(stream)).blob());
const checksum = async (bytes) => // CRC-32: gzip ends with it, little-endian, and with a length
  (await piped(bytes, new CompressionStream("gzip"))).slice(-8, -4).reverse();

// [kind, its bytes, where it starts, where it ends] of the parts of a JPEG, PNG or WebP file
function* partsOf(bytes) {
  const view = new DataView(bytes.buffer), name = (at) => textOf(bytes.subarray(at, at + 4));
  const jpeg = bytes[0] === 0xff, webp = name(0) === "RIFF";
  for (let at = jpeg ? 2 : webp ? 12 : 8, end; at + 8 < bytes.length; at = end) {
    if (jpeg && (bytes[at] !== 0xff || bytes[at + 1] === 0xda)) return; // the pixels
    const size = jpeg ? view.getUint16(at + 2) - 2 : view.getUint32(webp ? at + 4 : at, webp);
    const body = at + (jpeg ? 4 : 8);
    end = body + size + (webp ? size % 2 : jpeg ? 0 : 4);
    yield [name(jpeg ? body : webp ? at : at + 4), bytes.subarray(body, body + size), at, end];
  }
}

export async function readTags(file) { // {exif, icc}, where they are there and can be read
  let exif = null, icc = null;
  try {
    for (const [kind, body] of partsOf(await joined(file))) {
      if (kind === "Exif") exif = upright(body.subarray(6));
      if (kind === "eXIf") exif = upright(body);
      if (kind === "EXIF") exif = body; // of WebP files, which browsers do not turn
      if (kind === "ICC_") icc = await joined(icc ?? "", body.subarray(14)); // of a JPEG, in parts
      if (kind === "ICCP") icc = body;
      if (kind === "iCCP") {
        icc = await piped(body.subarray(body.indexOf(0) + 2), new DecompressionStream("deflate"));
      }
    }
  } catch { /* damaged from here on */ }
  const fits = icc && textOf(icc.subarray(16, 20)) === "RGB "; // as the saved pixels are
  return { exif, icc: fits ? icc : null };
}

function upright(exif) { // as the pixels are now; null if it is damaged
  try {
    const view = new DataView(exif.buffer, exif.byteOffset), little = exif[0] === 0x49;
    const first = view.getUint32(4, little), count = view.getUint16(first, little);
    for (let at = first + 2; at < first + 2 + 12 * count; at += 12) {
      if (view.getUint16(at, little) === 0x112) view.setUint16(at + 8, 1, little);
    }
    return exif;
  } catch { return null; }
}

// A file of the browser with these tags, and without the profile that it came with
export async function withTags(blob, { exif, icc }) {
  const bytes = await joined(blob), jpeg = blob.type === "image/jpeg", added = [], most = 65000;
  const segment = (marker, body) =>
    added.push(bigEndian(marker, 2), bigEndian(body.length + 2, 2), body);
  const chunk = async (body) =>
    added.push(bigEndian(body.length - 4, 4), body, await checksum(body));
  if (jpeg && exif && exif.length < 65528) segment(0xffe1, await joined("Exif\0\0", exif));
  for (let at = 0; jpeg && icc && at < icc.length; at += most) {
    const place = new Uint8Array([at / most + 1, Math.ceil(icc.length / most)]);
    segment(0xffe2, await joined("ICC_PROFILE\0", place, icc.subarray(at, at + most)));
  }
  const packed = !jpeg && icc && await piped(icc, new CompressionStream("deflate"));
  if (packed) await chunk(await joined("iCCPprofile\0\0", packed));
  if (!jpeg && exif) await chunk(await joined("eXIf", exif));
  const [, , , end] = partsOf(bytes).next().value; // JFIF or IHDR, which come first
  const kept = [bytes.subarray(0, end), ...added];
  let from = end;
  for (const [kind, , at, next] of partsOf(bytes)) {
    if (!/^(ICC_|iCCP|sRGB|gAMA|cHRM)$/.test(kind)) continue;
    kept.push(bytes.subarray(from, at));
    from = next;
  }
  return new Blob([...kept, bytes.subarray(from)], { type: blob.type });
}
