// Crop and mask of one photo, drawn on a canvas. Runs when its gr.HTML is first shown:
// `element`, `trigger` and `watch` are Gradio's. What is sent is a crop in fractions of the
// photo, and the mask as a small PNG. Both are kept in the browser until they are used. An editor
// without a tool to crop is of a mask alone, which `studio.mask` reads when an image is made.
const state = { tool: 'crop', box: null, painted: false, from: null, image: null, mask: null };
const paper = () => element.querySelector('canvas');
// x, y, width and height in percent of the photo.
const fields = () => [...element.querySelectorAll('[data-side]')];
const painted = () => (state.painted ? state.mask.toDataURL('image/png') : '');

const KEPT = 'dora-studio-drawn', MOST = 5;
const drawn = () => JSON.parse(localStorage.getItem(KEPT) ?? '[]')
  .filter(({ version }) => version !== paper().dataset.version);

function keep() {
  const { version } = paper().dataset;
  const others = drawn().slice(1 - MOST);
  const now = { version, box: state.box, mask: painted() };
  localStorage.setItem(KEPT, JSON.stringify([...others, now]));
}

function forget() {
  localStorage.setItem(KEPT, JSON.stringify(drawn()));
}

function takeUp() {
  const { version: own, mask: given } = paper().dataset;
  const kept = JSON.parse(localStorage.getItem(KEPT) ?? '[]')
    .find(({ version }) => version === own) ?? (given && { box: null, mask: given });
  if (!kept) return;
  state.box = kept.box;
  const mask = new Image();
  mask.onload = () => {
    state.mask.getContext('2d').drawImage(mask, 0, 0, state.mask.width, state.mask.height);
    state.painted = true;
    draw();
  };
  if (kept.mask) mask.src = kept.mask;
}

function begin() {
  const canvas = paper();
  if (!canvas) return;
  // Before it is drawn: what was painted on another image, or is cleared, is sent no more.
  Object.assign(state, { box: null, painted: false });
  const image = new Image();
  image.onload = () => {
    canvas.width = image.width;
    canvas.height = image.height;
    const mask = document.createElement('canvas');
    mask.width = image.width;
    mask.height = image.height;
    Object.assign(state, { image, mask, box: null, painted: false, from: null });
    canvas.painted = painted;
    takeUp();
    choose(element.querySelector('[data-tool]').dataset.tool);
  };
  image.src = canvas.dataset.photo;
}

function choose(tool) {
  state.tool = tool;
  for (const button of element.querySelectorAll('[data-tool]')) {
    button.classList.toggle('dd-on', button.dataset.tool === tool);
  }
  draw();
}

function type(typed) {
  const [x, y, width, height] = fields().map((field) => Number(field.value) / 100);
  const canvas = paper(), end = (from, size) => Math.min(1, Math.max(0, from + size));
  const corners = [end(x, 0), end(y, 0), end(x, width), end(y, height)];
  state.box = corners.map((part, side) => part * (side % 2 ? canvas.height : canvas.width));
  if (corners.join() === '0,0,1,1' || !(width > 0) || !(height > 0)) state.box = null;
  keep();
  draw(typed);
}

function draw(typed = null) {
  const canvas = paper();
  if (!canvas || !state.image) return;
  const [from, over, to, under] = state.box ?? [0, 0, canvas.width, canvas.height];
  [from / canvas.width, over / canvas.height, (to - from) / canvas.width,
    (under - over) / canvas.height].forEach((part, side) => {
    const field = fields()[side];
    if (field !== typed) field.value = Math.round(part * 1000) / 10;
  });
  const pen = canvas.getContext('2d');
  pen.globalAlpha = 1;
  pen.drawImage(state.image, 0, 0);
  pen.globalAlpha = 0.6;
  pen.drawImage(state.mask, 0, 0);
  pen.globalAlpha = 1;
  if (!state.box) return;
  const [left, top, right, bottom] = state.box;
  pen.fillStyle = 'rgba(0, 0, 0, .55)';
  pen.beginPath();
  pen.rect(0, 0, canvas.width, canvas.height);
  pen.rect(left, top, right - left, bottom - top);
  pen.fill('evenodd');
  pen.strokeStyle = '#ffffff';
  pen.lineWidth = Math.max(2, canvas.width / 300);
  pen.strokeRect(left, top, right - left, bottom - top);
}

// The rectangle that is typed, for those who do not paint by hand; all of it without one.
function fill() {
  const { width, height } = paper(), [left, top, right, bottom] = state.box ?? [0, 0, width, height];
  const pen = state.mask.getContext('2d');
  pen.globalCompositeOperation = 'source-over';
  pen.fillStyle = '#e35d2b';
  pen.fillRect(left, top, right - left, bottom - top);
  Object.assign(state, { box: null, painted: true });
  keep();
  draw();
}

function at(event) {
  const canvas = paper(), frame = canvas.getBoundingClientRect();
  const inside = (value, size) => Math.min(size, Math.max(0, value));
  return [
    inside((event.clientX - frame.left) / frame.width * canvas.width, canvas.width),
    inside((event.clientY - frame.top) / frame.height * canvas.height, canvas.height),
  ];
}

function move(event) {
  const canvas = paper(), to = at(event);
  if (state.tool === 'crop') {
    const [x, y] = state.from;
    state.box = [Math.min(x, to[0]), Math.min(y, to[1]), Math.max(x, to[0]), Math.max(y, to[1])];
  } else {
    const pen = state.mask.getContext('2d');
    pen.globalCompositeOperation = state.tool === 'erase' ? 'destination-out' : 'source-over';
    pen.strokeStyle = '#e35d2b';
    pen.lineWidth = canvas.width / 12;
    pen.lineCap = 'round';
    pen.beginPath();
    pen.moveTo(...state.from);
    pen.lineTo(to[0] + 0.01, to[1]);
    pen.stroke();
    state.painted = true;
    state.from = to;
  }
  draw();
}

element.addEventListener('input', (event) => { if (event.target.dataset.side) type(event.target); });
element.addEventListener('pointerdown', (event) => {
  if (event.target !== paper() || !state.image) return;
  event.preventDefault();
  event.target.setPointerCapture(event.pointerId);
  state.from = at(event);
  if (state.tool === 'crop') state.box = null;
  move(event);
});
element.addEventListener('pointermove', (event) => { if (state.from) move(event); });
element.addEventListener('pointerup', () => {
  // A click is not a crop.
  if (state.from && state.tool === 'crop' && state.box) {
    const [left, top, right, bottom] = state.box;
    if (right - left < 8 || bottom - top < 8) state.box = null;
    draw();
  }
  if (state.from) keep();
  state.from = null;
});
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-tool], [data-do]');
  if (!button) return;
  if (button.dataset.tool) return choose(button.dataset.tool);
  if (button.dataset.do === 'fill') return fill();
  if (button.dataset.do !== 'apply') forget();
  if (button.dataset.do === 'clear') {
    paper().dataset.mask = '';
    return begin();
  }
  if (button.dataset.do === 'drop') return trigger('click', { what: 'drop' });
  if (button.dataset.do === 'restore') return trigger('click', { what: 'restore' });
  const { width, height } = paper();
  const crop = state.box && [
    state.box[0] / width, state.box[1] / height, state.box[2] / width, state.box[3] / height,
  ];
  trigger('click', { what: 'apply', crop, mask: painted() });
});
watch('value', begin);
begin();
