// Captions of all photos. Runs when its gr.HTML is first shown: `element`, `trigger` and `watch` are
// Gradio's. What is typed is kept in the browser until the server says that it has written it.
const KEPT = 'dora-studio-captions';
const read = () => JSON.parse(localStorage.getItem(KEPT) ?? '{}');
const keep = (typed) => localStorage.setItem(KEPT, JSON.stringify(typed));
const fields = () => [...element.querySelectorAll('textarea')];
const send = () => { if (Object.keys(read()).length) trigger('input', { typed: read() }); };

function begin() {
  const typed = read();
  // A field that was typed in keeps its text when the one that it is drawn with changes.
  for (const field of fields()) field.value = typed[field.dataset.photo] ?? field.defaultValue;
  send();
}

window.ddCaptionsWritten = (written) => {
  const typed = read();
  for (const [photo, text] of Object.entries(written)) if (typed[photo] === text) delete typed[photo];
  keep(typed);
};

element.addEventListener('input', ({ target }) => {
  if (target.dataset.photo) keep({ ...read(), [target.dataset.photo]: target.value });
});
element.addEventListener('focusout', send);
// Enter moves to the next photo; with Shift it begins a line, which is a caption of its own.
element.addEventListener('keydown', (event) => {
  const place = fields().indexOf(event.target);
  if (event.key !== 'Enter' || event.shiftKey || event.isComposing || place < 0) return;
  event.preventDefault();
  (fields()[place + 1] ?? event.target).focus();
  send();
});
watch('value', begin);
begin();
