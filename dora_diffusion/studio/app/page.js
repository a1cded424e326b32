// Scripts of the page; those of captions and of the photo editor lie beside this one.
{
  // The browser ends the streams of a page that is left. Gradio closes them before, which is undone,
  // and opens others for what is asked until the next page comes: this waits until somebody is seen
  // to have stayed here.
  let stays;
  addEventListener('beforeunload', () => {
    stays = new Promise((done) => {
      for (const type of ['pointerdown', 'keydown'])
        addEventListener(type, done, {capture: true, once: true});
    });
  });
  const {abort} = AbortController.prototype;
  AbortController.prototype.abort = function (...reason) {
    if (window.event?.type !== 'beforeunload') abort.apply(this, reason);
  };
  // The page's <body> has `data-idle` while every request except the clock's is answered and drawn. Any
  // action of the user removes it. No frame is requested while it is there or an answer is missing.
  const FRAMES = 6, {fetch} = window;
  const requests = new Set(), events = new Set(), early = new Set();
  let joining = 0, streams = 0, frames = 0, isCounting = false;
  const count = () => {
    isCounting = false;
    // Events without a stream get no answer any more.
    if (requests.size || (streams && events.size) || !window.ddRestored) return;
    if (frames++ < FRAMES) return next();
    events.clear();
    document.body.dataset.idle = '';
  };
  const next = () => {
    if (!isCounting) requestAnimationFrame(count);
    isCounting = true;
  };
  const act = () => {
    frames = 0;
    if (document.body) delete document.body.dataset.idle;
    next();
  };
  window.ddActs = act;
  for (const type of ['pointerdown', 'pointerup', 'click', 'keydown', 'input', 'change', 'focusout'])
    addEventListener(type, act, true);
  const isClock = (body) => {
    const {fn_index: index} = JSON.parse(body);
    return gradio_config.dependencies.some(({id, targets}) =>
      id === index && targets.some(([, name]) => name === 'tick'));
  };
  // The stream may report the end of an event before the response with its id is here.
  const join = async (answer) => {
    joining++;
    try {
      const response = await answer;
      const {event_id: id} = response.ok ? await response.clone().json() : {};
      if (id && !early.delete(id)) events.add(id);
      return response;
    } finally {
      if (!--joining) early.clear();
    }
  };
  const follow = async (stream) => {
    let rest = '';
    try {
      const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
      for (let part; !(part = await reader.read()).done;) {
        const lines = (rest + part.value).split('\n');
        rest = lines.pop();
        for (const line of lines.filter((line) => line.includes('"process_completed"'))) {
          const {event_id: id} = JSON.parse(line.slice(line.indexOf('{')));
          if (events.delete(id)) act();
          else if (joining) early.add(id);
        }
      }
    } catch { /* A stream that is cut off has ended too. */ }
    streams--;
    if (events.size) act();
  };
  window.fetch = async (...request) => {
    const address = String(request[0].url ?? request[0]), {method, body} = request[1] ?? {};
    const isJoin = address.includes('/queue/join'), isStream = address.includes('/queue/data');
    const send = async () => {
      await stays;
      return fetch(...request);
    };
    if (isStream) {
      streams++;
      const response = await send().catch((error) => {
        streams--;
        if (events.size) act();
        throw error;
      });
      follow(response.clone().body);
      return response;
    }
    if (method !== 'POST' || (isJoin && isClock(body))) return send();
    requests.add(request);
    act();
    try {
      return await (isJoin ? join(send()) : send());
    } finally {
      requests.delete(request);
      act();
    }
  };
}

// Gradio tells each field of an event how it goes, of events without a sign of it too, and looks for
// the field in the whole page each time: most of what an event would cost.
new PerformanceObserver(async (loaded, observer) => {
  const script = loaded.getEntries().find(({name}) => /\/statustracker-[^/]*\.js$/.test(name));
  if (!script) return;
  observer.disconnect();
  const states = Object.values(await import(script.name)).find((one) => one?.prototype?.resolve_args);
  if (!states) return;
  const {resolve_args: resolve} = states.prototype;
  states.prototype.resolve_args = function (event) {
    return this.show_progress[event.fn_index] === 'hidden' ? [] : resolve.call(this, event);
  };
}).observe({type: 'resource', buffered: true});

document.addEventListener('input', ({target}) => {
  const id = target.closest?.('#class-word, #token')?.id;
  if (id) studio.letters[id] = target.value;
}, true);

// What was typed here before is not in the fields yet: a press, by a key too, would send the defaults.
document.addEventListener('click', (event) => {
  const isDeaf = event.target.closest?.('.tabitem button:is(.primary, .secondary, .stop)');
  if (isDeaf && document.querySelector('.dd-connecting')) event.stopImmediatePropagation();
}, true);

document.addEventListener('click', ({target}) => {
  const text = target.closest?.('[data-copy]') && target.parentElement.querySelector('pre');
  if (!text) return;
  getSelection().selectAllChildren(text);
  // Not every address is one that may write to the clipboard: there, what is selected is copied.
  if (navigator.clipboard) navigator.clipboard.writeText(text.textContent);
  else document.execCommand('copy');
  target.textContent = 'Copied';
});

window.studio = {
  // Buttons inside of HTML say what to do (data-do) and with what (data-value).
  clicks(element, trigger) {
    element.addEventListener('click', (event) => {
      const button = event.target.closest('[data-do]');
      if (button) trigger('click', {what: button.dataset.do, value: button.dataset.value});
    });
  },

  // A dropdown has a value of one's own when it is left: until then this keeps it, for this tab.
  typed: () => JSON.parse(sessionStorage.getItem('dora-studio-typed') ?? '{}'),

  // What was kept is back in the fields: of those with values of one's own, by id, keep these too.
  restored(kept, own) {
    for (const [event, keep] of [['input', true], ['focusout', false]])
      document.addEventListener(event, ({target}) => {
        const id = Object.keys(own).find((id) => document.getElementById(id)?.contains(target));
        if (!id) return;
        const now = {...studio.typed(), [own[id]]: keep ? target.value : undefined};
        sessionStorage.setItem('dora-studio-typed', JSON.stringify(now));
      });
    window.ddRestored = true;
    studio.locate();
    ddActs();
    return {...kept, ...studio.typed()};
  },

  // The address names the open tab and what is selected: a reload of this window shows it again. Until
  // the page has got that back from the address, what it shows first is no choice.
  located: {},
  locate(name, value) {
    if (name) studio.located[name] = value;
    if (!window.ddRestored) return;
    const address = new URL(location);
    for (const [name, value] of Object.entries(studio.located))
      address.searchParams[value ? 'set' : 'delete'](name, value);
    history.replaceState(history.state, '', address);
  },

  // Those who wait for fields, by name, are told once of all that change together.
  tell: {},
  changes: {},
  changed(name) {
    studio.changes[name] ??= setTimeout(() => { delete studio.changes[name]; studio.tell[name]?.(); });
  },

  // Not before the page has got back what was kept: its fields change when they are first drawn.
  keep: (kept, names, values) => window.ddRestored
    ? Object.fromEntries(names.map((name, i) => [name, values[i] ?? null]))
    : kept,

  // Whose they are is told by the subject that is chosen. Words that a subject filled in are not
  // typed: a slow page has them still when the next subject is chosen.
  words(kept, subject, ...words) {
    const fields = ['class-word', 'token'];
    const isTyped = fields.some((id, i) => studio.letters[id] === words[i]);
    if (!window.ddRestored || !isTyped) return kept;
    studio.letters = {};
    return {subject: subject ?? '', class_word: words[0], token: words[1]};
  },

  // Images of a <datalist>, one at a time, by a slider. It stays at its step while others come.
  flip(element, watch) {
    let chosen = null;
    const show = () => {
      const options = [...element.querySelectorAll('option')], range = element.querySelector('input');
      if (!range) return;
      const { dataset, text } = options[range.value];
      Object.assign(element.querySelector('img'), { src: dataset.image, alt: `Samples: ${text}` });
      element.querySelector('a').href = dataset.image;
      element.querySelector('output').textContent = text;
      range.setAttribute('aria-valuetext', text);
      // So that the next one is there when it is asked for.
      for (const near of [-1, 1]) new Image().src = options[+range.value + near]?.dataset.image ?? '';
    };
    const begin = () => {
      const options = [...element.querySelectorAll('option')], range = element.querySelector('input');
      const place = options.findIndex(({ text }) => text === chosen);
      if (place >= 0) range.value = place;
      show();
    };
    element.addEventListener('input', ({ target }) => {
      chosen = +target.value === +target.max ? null : element.querySelectorAll('option')[target.value].text;
      show();
    });
    watch('value', begin);
    begin();
  },

  showMasks: (on) => { document.documentElement.classList.toggle('dd-no-masks', !on); },

  // What somebody typed since then, by the field's id.
  letters: {},

  // What a button fills elsewhere on the page, as soon as it is drawn there, and whenever it grows, until
  // somebody does something.
  reveal(id, block = 'center') {
    const look = () => {
      const element = document.getElementById(id);
      if (!element?.offsetHeight) return;
      waiting.disconnect();
      growing.observe(element);
    };
    const growing = new ResizeObserver(([{target}]) => target.scrollIntoView({block}));
    const waiting = new MutationObserver(look);
    waiting.observe(document.body, {subtree: true, childList: true, attributes: true});
    const listeners = new AbortController();
    const stop = () => { waiting.disconnect(); growing.disconnect(); listeners.abort(); };
    for (const type of ['pointerdown', 'keydown', 'wheel', 'touchmove'])
      addEventListener(type, stop, {capture: true, signal: listeners.signal});
    look();
  },

  // What is painted on the image to start from, in the place of the last value.
  mask: (...values) =>
    [...values.slice(0, -1), document.querySelector('#start-image canvas')?.painted?.() ?? ''],

  // The id, or none where the question, which is the last value, is of another one or is not confirmed.
  confirmed: (id, ...rest) => {
    const asked = rest[rest.length - 1];
    return [asked?.question && asked.id === id && confirm(asked.question) ? id : '', ...rest];
  },

  // Asks before photos join a sample; without a subject's id they become one of their own.
  join(files, id, ...rest) {
    const sample = files?.length && document.querySelector('[data-sample]')?.dataset.sample;
    const asked = `Add these photos to the sample ${sample}? All photos of a subject are learned as `
      + 'one. Cancel makes a new subject of them.';
    return [files, sample && !confirm(asked) ? '' : id, ...rest];
  },
};
