// Before anything is painted: the colours that the reader has chosen, if any. A browser may refuse to
// keep anything, and throw at the question already.
try {
  document.documentElement.dataset.theme = localStorage.getItem("meshserve.theme") ?? "";
} catch {
  document.documentElement.dataset.theme = "";
}
