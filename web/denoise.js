// The page, its worker and its service worker; the last lines say which of them runs. Nothing is
// sent anywhere: the model and ONNX Runtime Web are loaded, photographs stay.

const FILES = ["./", "index.html", "style.css", "denoise.js", "tags.js", "photo.onnx"];
const TILE = 128, OVERLAP = 8; // pixels; as in experiment/tiling.py
const VERSION = "1.30.0"; // of ONNX Runtime Web: a copy beside the page, else from a public network
const PLACES = ["onnxruntime-web", `https://cdn.jsdelivr.net/npm/onnxruntime-web@${VERSION}`];
const RUNTIME = { // SHA-384 of the code and of the WebAssembly of each kind, and their names
  webgpu: {
    "1ntMeyj+z5diX6vBR5h+zlJBPc4iNvhCxE6nlammh8daBYcLBZkzrwDkuJjhwI+f": "ort.webgpu.bundle.min.mjs",
    "EPVDLTxuO663dkZO/pcKJF6vOyyfq/5z9FY1oksN0UWFX2ABH4wDDZQHeNoUleWR":
      "ort-wasm-simd-threaded.asyncify.wasm",
  },
  wasm: {
    "PLWz+nHEVHpjwBsO0YVdvQj6n5814Iv8E3b8FG0Rp/uIAtjFMCKOpP66iPzedrIG": "ort.wasm.bundle.min.mjs",
    "vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM": "ort-wasm-simd-threaded.wasm",
  },
};

// The model -----------------------------------------------------------------------------------

async function download([hash, file]) {
  for (const place of PLACES) {
    const integrity = `sha384-${hash}`;
    const answer = await fetch(`${place}/dist/${file}`, { integrity }).catch(() => null);
    if (answer?.ok) return answer.arrayBuffer();
  }
  throw new Error(`${file} of ONNX Runtime Web ${VERSION} cannot be loaded; go online once`);
}

async function startEngine(kind) {
  const [code, wasmBinary] = await Promise.all(Object.entries(RUNTIME[kind]).map(download));
  const ort = await import(URL.createObjectURL(new Blob([code], { type: "text/javascript" })));
  const numThreads = self.crossOriginIsolated ? Math.min(8, navigator.hardwareConcurrency) : 1;
  Object.assign(ort.env.wasm, { wasmBinary, numThreads });
  const answer = await fetch("photo.onnx").catch(() => null);
  if (!answer?.ok) throw new Error("the model, photo.onnx, cannot be loaded from beside the page");
  const model = new Uint8Array(await answer.arrayBuffer());
  const session = await ort.InferenceSession.create(model, { executionProviders: [kind] });
  const restore = async (values, height, width) => {
    const noisy = new ort.Tensor("float32", values, [1, 3, height, width]);
    return (await session.run({ noisy })).restored.data;
  };
  await restore(new Float32Array(3 * 16 * 16), 16, 16); // a GPU that cannot do it fails here
  return { restore, name: kind === "wasm" ? `WebAssembly, threads: ${numThreads}` : "WebGPU" };
}

async function bestEngine() {
  const gpu = await navigator.gpu?.requestAdapter().catch(() => null);
  const fast = gpu && !gpu.info?.isFallbackAdapter; // one of software is far slower than WebAssembly
  return (fast && await startEngine("webgpu").catch(() => null)) || startEngine("wasm");
}

// Images --------------------------------------------------------------------------------------

const canvasOf = (width, height) =>
  new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });

// Upright, but with the numbers of the file, not converted to the colours of the screen
async function decode(file) {
  return createImageBitmap(file, { colorSpaceConversion: "none" }).catch(() => {
    throw new Error("this browser cannot read it as an image; take a JPEG, PNG or WebP file");
  });
}

// [[first pixel, weight of each pixel]]: evenly spread tiles, whose weights sum to 1
function windows(size) {
  const tile = Math.min(size, TILE);
  const count = size > tile ? Math.ceil((size - OVERLAP) / (tile - OVERLAP)) : 1;
  const rounded = (x) => (x % 1 === 0.5 ? 2 * Math.round(x / 2) : Math.round(x)); // as numpy does
  const step = (size - tile) / (count - 1 || 1), total = new Float32Array(size);
  const starts = Array.from({ length: count }, (_, i) => rounded(i * step));
  const ramp = Float32Array.from({ length: tile }, (_, i) =>
    Math.min(i + 0.5, tile - 0.5 - i, OVERLAP));
  for (const start of starts) ramp.forEach((weight, i) => { total[start + i] += weight; });
  return starts.map((start) => [start, ramp.map((weight, i) => weight / total[start + i])]);
}

function rowsOf(image, top, height, filter = "none") { // RGBA
  const strip = canvasOf(image.width, height);
  strip.filter = filter;
  strip.drawImage(image, 0, -top);
  return strip.getImageData(0, 0, image.width, height).data;
}

function examine(image) { // whether it is grey, and whether some of it is hidden
  let grey = true, hidden = false;
  for (let top = 0; top < image.height; top += TILE) {
    const pixels = rowsOf(image, top, Math.min(TILE, image.height - top));
    for (let i = 0; i < pixels.length; i += 4) {
      grey &&= pixels[i] === pixels[i + 1] && pixels[i] === pixels[i + 2];
      hidden ||= !pixels[i + 3];
    }
  }
  return { grey, hidden };
}

// Restores an image in overlapping tiles that fade into each other, as experiment/tiling.py does;
// calls tileDone(number of all) after every one, bandDone(first row, ImageData) from top to bottom.
async function restoreImage(restore, image, tileDone, bandDone) {
  const { grey, hidden } = examine(image), { width } = image;
  const rows = windows(image.height), columns = windows(width);
  const high = rows[0][1].length, wide = columns[0][1].length, area = high * wide;
  let unfinished = new Float32Array(0);
  for (const [number, [top, fade]] of rows.entries()) {
    const pixels = rowsOf(image, top, high);
    // What alpha hides has the colours of what is around it.
    const around = hidden ? rowsOf(image, top, high, "blur(8px)") : pixels;
    const band = new Float32Array(3 * width * high), noisy = new Float32Array(3 * area);
    for (const [left, across] of columns) {
      const place = (i) => Math.floor(i / wide) * width + left + i % wide;
      for (let i = 0; i < area; i++) {
        const at = 4 * place(i), source = pixels[at + 3] ? pixels : around;
        for (let c = 0; c < 3; c++) noisy[c * area + i] = source[at + c] / 255;
      }
      const restored = await restore(noisy, high, wide);
      for (let i = 0; i < area; i++) {
        const at = 3 * place(i), weight = fade[Math.floor(i / wide)] * across[i % wide];
        const mean = (restored[i] + restored[area + i] + restored[2 * area + i]) / 3;
        for (let c = 0; c < 3; c++) {
          band[at + c] += weight * (grey ? mean : restored[c * area + i]);
        }
      }
      await tileDone(rows.length * columns.length);
    }
    unfinished.forEach((value, i) => { band[i] += value; });
    const end = number + 1 < rows.length ? rows[number + 1][0] : image.height;
    const done = new ImageData(width, end - top);
    done.data.forEach((_, i, data) => {
      data[i] = i % 4 < 3 ? 255 * band[3 * (i >> 2) + i % 4] : pixels[i];
    });
    unfinished = band.subarray(3 * width * (end - top));
    bandDone(top, done);
  }
}

// The file to save: between the original and the result, with the original's tags
async function blend({ file, result, strength, type }) {
  const [before, after] = await Promise.all([decode(file), decode(result)]);
  const { width, height } = before, canvas = canvasOf(width, height);
  for (let top = 0; top < height; top += TILE) {
    const rows = Math.min(TILE, height - top), pixels = rowsOf(before, top, rows);
    rowsOf(after, top, rows).forEach((value, i) => { pixels[i] += strength * (value - pixels[i]); });
    canvas.putImageData(new ImageData(pixels, width), 0, top);
  }
  if (type === "image/jpeg") { // which has no transparency
    canvas.globalCompositeOperation = "destination-over";
    canvas.fillStyle = "#fff";
    canvas.fillRect(0, 0, width, height);
  }
  const { readTags, withTags } = await import("./tags.js");
  const blob = await canvas.canvas.convertToBlob({ type, quality: 0.95 });
  return withTags(blob, await readTags(file));
}

// The worker ----------------------------------------------------------------------------------

function worker() {
  let engine = null, stopped = false;
  const jobs = {
    async restore({ id, file }) {
      stopped = false;
      const image = await decode(file), { width, height } = image;
      if (width * height > 1e8 || Math.max(width, height) > 65535) { // more than a canvas can have
        throw new Error("more than 100 megapixels or 65535 pixels a side; take denoise_image.py");
      }
      postMessage({ id, job: "open", width, height });
      engine ??= bestEngine();
      const failed = (error) => { engine = null; throw error; }; // so that the next one starts it
      const { restore, name } = await engine.catch(failed);
      const restored = (...tile) => restore(...tile).catch(failed);
      const canvas = canvasOf(width, height);
      let count = 0;
      await restoreImage(restored, image, async (tiles) => {
        postMessage({ id, job: "tile", count: ++count, tiles, name });
        await new Promise((resume) => setTimeout(resume)); // so that messages come in
        if (stopped) throw new Error("stopped");
      }, (top, band) => {
        canvas.putImageData(band, 0, top);
        postMessage({ id, job: "band", top, band }, [band.data.buffer]);
      });
      image.close();
      return { result: await canvas.canvas.convertToBlob() };
    },
    save: async (data) => ({ saved: await blend(data) }),
    stop: async () => { stopped = true; },
  };
  self.onmessage = async ({ data }) => {
    const { id, job } = data;
    const answer = await jobs[job](data).catch((error) => ({ failed: error.message }));
    postMessage({ id, job, ...answer });
  };
}

// The service worker: headers that allow threads, and the page without a network ------------------

function serviceWorker() {
  const headers = [["Cross-Origin-Opener-Policy", "same-origin"],
    ["Cross-Origin-Embedder-Policy", "require-corp"]];
  const runtime = PLACES.flatMap((place) =>
    Object.values(RUNTIME).flatMap(Object.values).map((file) => `${place}/dist/${file}`));
  const own = [...FILES, ...runtime].map((file) => new URL(file, location).href);
  const answer = async (request, address) => {
    const cache = await caches.open(VERSION), fresh = await fetch(request).catch(() => null);
    if (fresh?.ok) await cache.put(address, fresh.clone());
    const found = fresh ?? await cache.match(address) ?? Response.error();
    if (!found.status) return found;
    const all = new Headers([...found.headers, ...headers]);
    return new Response(found.body, { status: found.status, headers: all });
  };
  const ready = async () => (await caches.open(VERSION)).addAll(FILES);
  self.oninstall = (event) => event.waitUntil(ready().then(() => self.skipWaiting()));
  self.onactivate = (event) => event.waitUntil(self.clients.claim());
  self.onfetch = (event) => {
    const [address] = event.request.url.split(/[?#]/);
    if (own.includes(address)) event.respondWith(answer(event.request, address));
  };
}

// The page ------------------------------------------------------------------------------------

function page() {
  const the = (id) => document.getElementById(id);
  if (location.protocol === "file:") {
    the("status").textContent = "Serve this folder: python -m http.server; open localhost:8000";
    return;
  }
  const photos = []; // of each its file, button, state, size, result (a Blob) and, in use, canvas
  let shown = null, running = null;
  const engine = new Worker("denoise.js", { type: "module" });
  const send = (photo, job, more) =>
    engine.postMessage({ id: photos.indexOf(photo), job, file: photo.file, ...more });
  const say = ({ file }, words) => {
    the("status").textContent = `${file.name.replace(/^(.{40}).{4,}$/s, "$1…")}: ${words}`;
  };
  const create = (kind, values) => Object.assign(document.createElement(kind), values);

  function add(files) {
    if (!files.length) the("status").textContent = "There is no photograph in it.";
    for (const file of files) {
      const item = the("entry").content.firstElementChild.cloneNode(true);
      const photo = { file, button: item.firstChild };
      photo.button.firstChild.textContent = file.name;
      photo.button.onclick = () => show(photo).catch((error) => say(photo, error.message));
      the("list").append(item);
      photos.push(photo);
      become(photo, "waiting");
    }
    runNext();
  }

  function become(photo, state) {
    photo.state = photo.button.lastChild.textContent = state;
    photo.button.disabled = !photo.width;
    the("bar").hidden = !running;
    the("stop").hidden = !running && photos.every((other) => other.state !== "stopped");
    the("stop").textContent = running ? "Stop" : "Start again";
    the("png").disabled = the("jpeg").disabled = !shown?.result;
  }

  function runNext() {
    const next = photos.find((photo) => photo.state === "waiting");
    if (running || !next) return;
    running = next;
    become(next, "running");
    say(next, "reading it and loading the model");
    the("bar").removeAttribute("value");
    send(next, "restore");
  }

  async function show(photo) {
    shown?.button.removeAttribute("aria-current");
    if (shown && shown !== running) shown.canvas = null;
    shown = photo;
    photo.button.setAttribute("aria-current", "true");
    const files = [photo.file, photo.result];
    const images = await Promise.all(files.map((file) => file && decode(file)));
    if (shown !== photo) return; // another one was chosen meanwhile
    const [before, after] = images.map((image) => {
      const { width, height } = image ?? photo, canvas = create("canvas", { width, height });
      if (image) canvas.getContext("2d").drawImage(image, 0, 0);
      image?.close();
      return canvas;
    });
    photo.canvas = files[1] ? after : photo.canvas ?? after; // bands have come in meanwhile
    the("stack").replaceChildren(before, photo.canvas);
    the("view").setAttribute("aria-label", `${photo.file.name} before and after`);
    the("result").hidden = false;
    become(photo, photo.state);
    lay();
  }

  function lay() { // the result over the original: from where on, and how strong
    const [before, after] = the("stack").children, view = the("view");
    if (!after) return;
    const width = view.classList.contains("full") ? `${after.width / devicePixelRatio}px` : "";
    before.style.width = after.style.width = width;
    const edge = the("split").value / 100 * view.clientWidth;
    the("grip").style.left = `${edge}px`;
    const left = view.getBoundingClientRect().left + edge - after.getBoundingClientRect().left;
    after.style.clipPath = `inset(0 0 0 ${Math.max(0, left)}px)`;
    after.style.opacity = the("strength").value / 100;
    the("percent").textContent = `${the("strength").value} %`;
  }

  const hear = {
    open(photo, { width, height }) {
      Object.assign(photo, { width, height, canvas: create("canvas", { width, height }) });
      become(photo, "running");
      if (!shown?.result) photo.button.click();
    },
    tile(photo, { count, tiles, name }) {
      Object.assign(the("bar"), { max: tiles, value: count });
      the("engine").textContent = `Computed by ${name}.`;
      if (count % 16 === 1) say(photo, `part ${count} of ${tiles}`); // enough for screen readers
    },
    band: (photo, { top, band }) => photo.canvas.getContext("2d").putImageData(band, 0, top),
    restore(photo, { result, failed }) {
      const state = failed ?? `done, ${photo.width}×${photo.height}`;
      photo.result = result;
      running = null;
      if (photo !== shown) photo.canvas = null; // it can be drawn again
      become(photo, state);
      say(photo, state);
      runNext();
    },
    save(photo, { saved, failed }) {
      const kind = saved?.type === "image/png" ? "png" : "jpg";
      const download = photo.file.name.replace(/(\.[^.]*)?$/, `_denoised.${kind}`);
      if (saved) create("a", { href: URL.createObjectURL(saved), download }).click();
      say(photo, failed ?? `saved as ${download}`);
    },
  };
  engine.onmessage = ({ data }) => hear[data.job]?.(photos[data.id], data);

  the("stop").onclick = () => {
    const [from, to] = running ? ["waiting", "stopped"] : ["stopped", "waiting"];
    for (const photo of photos) if (photo.state === from) become(photo, to);
    if (!running) return runNext();
    say(running, "stopping");
    send(running, "stop");
  };
  the("png").onclick = the("jpeg").onclick = ({ target }) => {
    say(shown, "writing the file");
    const { result } = shown, strength = the("strength").value / 100;
    send(shown, "save", { result, strength, type: `image/${target.id}` });
  };
  the("zoom").onclick = () => {
    the("zoom").setAttribute("aria-pressed", the("view").classList.toggle("full"));
    lay();
  };
  the("split").oninput = the("strength").oninput = the("view").onscroll = self.onresize = lay;
  the("grip").onpointerdown = (event) => the("grip").setPointerCapture(event.pointerId);
  the("grip").onpointermove = (event) => {
    const { left, width } = the("view").getBoundingClientRect();
    if (event.buttons) the("split").value = 100 * (event.clientX - left) / width;
    lay();
  };
  the("files").onchange = ({ target }) => { add([...target.files]); target.value = ""; };
  document.onpaste = (event) => add(event.clipboardData.files);
  self.ondragover = (event) => event.preventDefault();
  self.ondrop = (event) => { event.preventDefault(); add(event.dataTransfer.files); };
  self.onbeforeunload = (event) => { if (running) event.preventDefault(); };
  // The headers of the service worker allow threads, once the page is loaded again.
  const { serviceWorker } = navigator;
  serviceWorker?.register("denoise.js").then(() => serviceWorker.ready).then(() => {
    if (self.crossOriginIsolated || photos.length || sessionStorage.again) return;
    sessionStorage.again = "once";
    location.reload();
  }).catch(() => {}); // without them, then
}

if (self.document) page();
else if (self.registration) serviceWorker();
else worker();
