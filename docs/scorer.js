// How the search orders its results: what Sphinx has by default, with the guides before the pages that mention everything.
"use strict";

var Scorer = {
  score: ([docname, title, anchor, descr, score]) => {
    const late = /^(changes|contract|design|benchmarks|promises|genindex)$/;
    if (late.test(docname)) return score - 20;
    if (docname.startsWith("reference/")) return score - 4;
    return score;
  },
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
