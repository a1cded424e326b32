// Search of the site, from files too: sections of its pages (`search-index.js`, which
// `tools/search.py` writes) in MiniSearch. `siteSearch(query)` needs no page, so that tests and
// `python -m tools.search` call it alone.
(() => {
  "use strict";

  // Words that say nothing of what is asked, in any form.
  const STOP = new Set(
    `a about actual add after all also am an and another any anyone are as at be been best bug but by ca can could do
    doc does doing done else ever feat feature first for from get gets getting give gives good got had has
    have help here how i if in into is issue it its just latest like make me mean my need new no not nothing
    of on one or other our out own please possible question quick request should since so some someone still
    such support than that the their them then theory there these they this to too try up update us use used
    user using version want was way we were what whatever when where which while why will with without wo would
    you your`.split(/\s+/).map(stem),
  );
  // One word for what is one thing here, on both sides: pages and questions.
  const SAME = Object.fromEntries(
    [
      "lora adapter",
      "memory vram oom ram",
      "resume continue",
      "overfit overtrain overbake overcook burn burnt burned fried fry",
      "a1111 automatic1111 auto1111 automatic",
      "delete remove erase",
      "gpu card videocard",
      "several multiple multi many two",
      "mac macos apple m1 m2 m3 m4 mps silicon",
      "amd rocm",
      "scheduler sampler",
      "guidance cfg",
      "rank dim",
      "photo picture pic",
      "image img",
    ].flatMap((line) => line.split(" ").map((word) => [stem(word), stem(line.split(" ")[0])])),
  );

  // Words that many questions have, and that tell pages apart badly; so do short numbers.
  const SELDOM = new Set(["lora", "train"].map(stem));
  const LITTLE = new Set(
    `ability different dreambooth error example fail file image kohya loss model number option problem quality
    result script sd sdxl set setting specific value work`.split(/\s+/).map(stem),
  );
  const telling = (word) =>
    SELDOM.has(word) ? 0.25 : /^v?\d{1,3}$/.test(word) ? 0.3 : LITTLE.has(word) ? 0.5 : 1;

  // A word without its ending: training, trained, trains -> train; regularization as regularisation.
  function stem(word) {
    if (word.length < 4 || /\d/.test(word)) return word;
    let short = word.replace(/iz(?=[ei]|ation)/, "is").replace(/ies$/, "y").replace(/(?<![su])s$/, "");
    short = short.replace(/(?<=\w{3})(?:ing|ed)$|(?<=\w{4})ion$/, "");
    if (/[^aeiouls]$/.test(short) || short.length > 5) short = short.replace(/([^aeiou\W])\1$/, "$1");
    return short.replace(/(?<=\w{3})e$/, "");
  }
  const term = (word) => SAME[stem(word)] ?? stem(word);
  const WORD = /[\p{L}\p{N}]+/gu;
  const REWRITES = [
    [/(?:n['\u2019]t|['\u2019](?:s|re|ve|ll|m|d))\b/g, " "], // can't, it's
    [/[\d.]*\s?\b\d*(?:s|sec|it)\/(?:it|s)\b/g, " slow "], // 73s/it: a speed is asked about where it is slow
    [/\b([a-z])-(?=[a-z])/g, "$1"], // b-lora, v-pred
    [/\bv ?pred(?:iction)?\b/g, "vpred"],
    [/(\d)\s?(gi?b)\b/g, "$1 $2"], // 8gb
    [/\bhow (many|much)\b/g, "quantity"], // no question about several
  ];
  const words = (text) =>
    REWRITES.reduce((rest, [pattern, by]) => rest.replace(pattern, by), text.toLowerCase()).match(WORD) ?? [];

  // A place in the site counts by its folder: what answers comes before what is looked up.
  const FOLDERS = { understand: 0.9, reference: 0.5, measurements: 0.6, contributing: 0.4 };
  const weight = ({ path }) =>
    path.startsWith("reference/changelog") ? 0.15
    : /(^|\/)index\.html/.test(path) ? 0.4
    : (FOLDERS[path.split("/")[0]] ?? 1);
  const BOOST = { heading: 4, synonyms: 4, about: 3, text: 1 };

  const known = new Set();
  const sections = SEARCH_PAGES.flatMap(({ path, title, synonyms, sections }) =>
    sections.map((section, i) => ({
      ...section,
      title,
      path: path + section.anchor,
      synonyms: i ? section.synonyms : synonyms,
      about: `${title} ${synonyms}`,
    })),
  );
  const index = new MiniSearch({
    fields: Object.keys(BOOST),
    tokenize: words,
    processTerm: (word) => {
      known.add(term(word));
      return term(word);
    },
  });
  index.addAll(sections.map((section, id) => ({ id, ...section })));

  const asked = (query) => {
    // A name that no page has is asked by its parts: flux2klein9b, rtx3090.
    const parts = (word) => (known.has(term(word)) ? [word] : (word.match(/\d+|[^\d]+/g) ?? []));
    const all = [...new Set(words(query).flatMap(parts))];
    const some = all.filter((word) => !STOP.has(stem(word)) && !/^[a-z]$/.test(word));
    return some.length ? some : all;
  };

  // Words that stand together in the question count more where they stand together in what a
  // section is about.
  const PHRASE = 1;
  const pairsOf = (list) => list.slice(1).map((word, i) => `${term(list[i])} ${term(word)}`);
  const seen = new Map();
  const pairsIn = (id) => {
    const { heading, synonyms, about } = sections[id];
    if (!seen.has(id)) seen.set(id, new Set(pairsOf(words(`${heading}, ${synonyms}, ${about}`))));
    return seen.get(id);
  };

  // Pages in the order of their best section, each with it and the next ones.
  globalThis.siteSearch = (query) => {
    const found = index.search(asked(query).join(" "), {
      boost: BOOST,
      bm25: { k: 1.2, b: 0.7, d: 0.1 },
      tokenize: (text) => text.split(" "),
      processTerm: term,
      prefix: (word) => word.length > 2 && !known.has(word),
      fuzzy: (word) => (known.has(word) || word.length < 4 ? false : 0.3),
      weights: { fuzzy: 0.6, prefix: 0.4 },
      boostTerm: telling,
      boostDocument: (id) => weight(sections[id]),
    });
    // MiniSearch multiplies by how many words were found; here by what they tell.
    const told = (result) => result.queryTerms.reduce((sum, word) => sum + telling(word), 0) / result.queryTerms.length;
    const pages = new Map();
    const pairs = pairsOf(asked(query));
    const near = ({ id }) => pairs.filter((pair) => pairsIn(id).has(pair)).length / (pairs.length || 1);
    for (const result of found) result.score *= told(result) * (1 + PHRASE * near(result));
    for (const { id, score, terms } of found.sort((a, b) => b.score - a.score)) {
      const path = sections[id].path.split("#")[0];
      if (!pages.has(path)) pages.set(path, []);
      pages.get(path).push({ ...sections[id], score, terms });
    }
    return [...pages.values()].map(([best, ...others]) => ({ ...best, others: others.slice(0, 3) }));
  };

  if (typeof document === "undefined") return;

  const element = (name, ...content) => {
    const node = document.createElement(name);
    node.append(...content);
    return node;
  };
  const link = ({ path }, text) => Object.assign(element("a", text), { href: path });
  const name = ({ title, heading }) => (heading === title ? title : `${title} \u203a ${heading}`);

  // Some words of a text around the first place with most of the terms, which are marked.
  const excerpt = ({ text, terms }, length = 220) => {
    const hits = [...text.matchAll(WORD)].filter(([word]) => terms.includes(term(word.toLowerCase())));
    const near = (hit) => hits.filter(({ index: at }) => at >= hit.index && at < hit.index + length).length;
    const first = hits.reduce((best, hit) => (!best || near(hit) > near(best) ? hit : best), null)?.index ?? 0;
    const start = first < 60 ? 0 : text.lastIndexOf(" ", first - 40) + 1;
    const node = element("p", start ? "\u2026 " : "");
    let at = start;
    for (const { 0: word, index: place } of hits.filter((hit) => hit.index >= start && hit.index < start + length)) {
      node.append(text.slice(at, place), element("mark", word));
      at = place + word.length;
    }
    node.append(text.slice(at, Math.max(at, start + length)), text.length > start + length ? " \u2026" : "");
    return node;
  };

  const show = (query) => {
    const results = query.trim() ? siteSearch(query).slice(0, 10) : [];
    const items = results.map((result) => {
      const item = element("li", link(result, name(result)), excerpt(result));
      if (result.others.length) item.append(element("small", "Also: "));
      result.others.forEach((other, i) => item.lastChild.append(i ? ", " : "", link(other, other.heading)));
      return item;
    });
    document.getElementById("search-results").replaceChildren(...items);
    const count = `${results.length} ${results.length === 1 ? "page" : "pages"}`;
    document.getElementById("search-status").textContent = query.trim() ? (results.length ? count : "Nothing found.") : "";
  };

  document.addEventListener("DOMContentLoaded", () => {
    const field = document.querySelector("#search-form input");
    field.value = new URLSearchParams(location.search).get("q") ?? "";
    field.addEventListener("input", () => show(field.value));
    field.focus();
    show(field.value);
  });
})();
