// Captions of all photos. Runs when its gr.HTML is first shown: `element`, `trigger` and `watch` are
// Gradio's. What is typed is kept in the browser until the server says that it has written it.
const KEPT = 'dora-studio-captions';
const read = () => JSON.parse(localStorage.getItem(KEPT) ?? '{}');
const keep = (typed) => localStorage.setItem(KEPT, JSON.stringify(typed));
const fields = () => [...element.querySelectorAll('textarea')];
// One save after the other, then the button that was pressed meanwhile: what is asked at once may come
// to the server the other way around.
let saving = false, again = false;
const waiting = [];
const send = () => {
  again = saving;
  if (saving || !Object.keys(read()).length) return;
  saving = true;
  trigger('input', { typed: read() });
};
// The field that is typed in: where the rows are drawn anew meanwhile, the next letter goes there.
let current = null;

function begin() {
  const typed = read(), before = current;
  // A field that was typed in keeps its text when the one that it is drawn with changes.
  for (const field of fields()) field.value = typed[field.dataset.photo] ?? field.defaultValue;
  const same = before && !before.isConnected
    && fields().find((field) => field.dataset.photo === before.dataset.photo);
  if (same) {
    same.focus();
    same.setSelectionRange(before.selectionStart, before.selectionEnd);
  }
  send();
}

window.ddCaptionsWritten = (written) => {
  const typed = read();
  for (const [photo, text] of Object.entries(written)) if (typed[photo] === text) delete typed[photo];
  keep(typed);
};

window.ddCaptionsAnswered = () => {
  saving = false;
  if (again) send();
  if (!saving) waiting.splice(0).forEach((go) => go());
};
window.ddCaptionsSaved = async (...values) => {
  if (saving) await new Promise((go) => waiting.push(go));
  return values;
};

element.addEventListener('input', ({ target }) => {
  if (target.dataset.photo) keep({ ...read(), [target.dataset.photo]: target.value });
});
element.addEventListener('focusin', ({ target }) => { if (target.dataset.photo) current = target; });
element.addEventListener('focusout', ({ target }) => {
  setTimeout(() => { if (target === current && target.isConnected) current = null; });
  send();
});
// Enter moves to the next photo; with Shift it begins a line, which is a caption of its own. Arrows
// move from the ends of a text, as if all of them were one.
element.addEventListener('keydown', (event) => {
  const { target, key } = event, place = fields().indexOf(target);
  if (place < 0 || event.shiftKey || event.isComposing) return;
  const isAt = (end) => target.selectionStart === end && target.selectionEnd === end;
  const isDown = key === 'Enter' || (key === 'ArrowDown' && isAt(target.value.length));
  if (!isDown && !(key === 'ArrowUp' && isAt(0))) return;
  event.preventDefault();
  const next = fields()[place + (isDown ? 1 : -1)] ?? target, end = isDown ? next.value.length : 0;
  next.focus();
  next.setSelectionRange(end, end);
  if (next === target) send();
});
watch('value', begin);
begin();
