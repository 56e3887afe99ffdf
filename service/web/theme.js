// Loaded before the page is drawn, so that a chosen theme does not flash: not a module for that reason.
document.documentElement.dataset.theme = localStorage.getItem("theme") ?? "";
