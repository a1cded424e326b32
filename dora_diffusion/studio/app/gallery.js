// All images, or all runs, a page at a time as they are scrolled. Runs when its gr.HTML is first shown:
// `element`, `trigger`, `watch` and `server` are Gradio's. The cards stay when the clock says that there are
// others: as many as are shown are then asked for again.
const grid = document.createElement('div'), end = document.createElement('div');
grid.className = 'dd-samples';
let asked = 0, shown = 0, total = 0;

async function load(from, count) {
  const turn = ++asked;
  const page = await server.list_page({ from, count }).catch(() => null);
  // The app has ended, or the page has asked for more meanwhile.
  if (!page || turn !== asked) return;
  if (from) grid.insertAdjacentHTML('beforeend', page.cards);
  else grid.innerHTML = page.cards;
  shown = from + page.count;
  total = page.total;
  // It may be in sight still.
  watcher.unobserve(end);
  if (shown < total) watcher.observe(end);
}

const watcher = new IntersectionObserver(([{ isIntersecting }]) => {
  if (!isIntersecting || (shown && shown === total)) return;
  watcher.unobserve(end);
  load(shown, 0);
}, { rootMargin: '300px' });

function begin() {
  element.append(grid, end);
  if (shown) load(0, shown);
  else watcher.observe(end);
}

studio.clicks(element, trigger);
watch('value', begin);
begin();
