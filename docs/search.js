// Scores of the site's search (html_search_scorer of Sphinx).
//
// A page scores by the words of the query that it has: most in its title, then in headings and its
// first paragraph (`conf.py` indexes these as a title's), least in its text; rare words count more.
// No page need have all words. Pages that are looked things up in come after those that answer.
const WEIGHT = { title: 8, heading: 4, text: 1 };
const FOLDERS = { understand: 0.6, reference: 0.35, measurements: 0.2, contributing: 0.2 };

var Scorer = {
  score: ([page, title, anchor, description, score]) =>
    Math.min(score, 20) * (FOLDERS[page.split("/")[0]] ?? 1) * (page.endsWith("/index") ? 0.3 : 1),
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 10,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};

// The pages of a word, or of words that begin with it where it is long enough.
const pagesOf = (index, word) => {
  const pages = new Map();
  for (const [term, files] of Object.entries(index)) {
    const share = term === word ? 1 : word.length > 3 && term.startsWith(word) ? 0.6 : 0;
    if (share) for (const file of [files].flat()) pages.set(file, Math.max(share, pages.get(file) ?? 0));
  }
  return pages;
};

const scoreTerms = (searchTerms, excludedTerms) => {
  const { terms, titleterms, titles, docnames, filenames } = Search._index;
  const stemmer = new Stemmer();
  const names = titles.map((title) =>
    new Set(title.toLowerCase().split(/[^\p{L}\p{N}_]+/u).map((word) => stemmer.stemWord(word))));
  const scores = new Array(titles.length).fill(0);
  let best = 0;
  for (const word of searchTerms) {
    const text = pagesOf(terms, word);
    const heading = pagesOf(titleterms, word);
    const rarity = Math.log(1 + titles.length / (new Set([...text.keys(), ...heading.keys()]).size || 1));
    best += WEIGHT.title * rarity;
    titles.forEach((_, file) => {
      scores[file] += rarity * Math.max(
        names[file].has(word) ? WEIGHT.title : 0,
        WEIGHT.heading * (heading.get(file) ?? 0),
        WEIGHT.text * (text.get(file) ?? 0),
      );
    });
  }
  for (const word of excludedTerms)
    for (const index of [terms, titleterms]) for (const file of pagesOf(index, word).keys()) scores[file] = 0;
  return titles
    .map((title, file) => [docnames[file], title, "", null, (20 * scores[file]) / (best || 1), filenames[file], "text"])
    .filter((result) => result[4] > 0);
};

// Sphinx loads this file before or after its search, by version; the search begins later.
const replaceSearch = () => (Search.performTermsSearch = scoreTerms);
if (typeof Search === "undefined") document.addEventListener("DOMContentLoaded", replaceSearch);
else replaceSearch();
