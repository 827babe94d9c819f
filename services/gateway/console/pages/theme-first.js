// Before anything is painted: the colours that the reader has chosen, if any.
document.documentElement.dataset.theme = localStorage.getItem("meshserve.theme") ?? "";
