// Searches tables and saves them as CSV, on this page alone: nothing is sent anywhere.
const leaves = (element) => {
  const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
  const texts = [];
  while (walker.nextNode()) texts.push(walker.currentNode.data);
  return texts.join(" ").replace(/\s+/g, " ").trim();
};

function search(scope, text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  for (const row of scope.querySelectorAll("tbody tr")) {
    const content = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => content.includes(word));
  }
  for (const group of scope.querySelectorAll(":scope > details")) {
    if (!group.querySelector("table")) continue;
    const found = group.querySelector("tbody tr:not([hidden])") !== null;
    group.hidden = !found;
    group.open = words.length > 0 && found;
  }
}

// A spreadsheet would run a text as a formula that begins like one: an apostrophe keeps it a text.
function field(value) {
  let text = value === null || value === undefined ? "" : String(value);
  if (/^−[\d.]+(e[−+]?\d+)?$/.test(text)) text = text.replaceAll("−", "-");
  if (/^[=+\-@\t\r]/.test(text) && !Number.isFinite(Number(text))) text = "'" + text;
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

const csv = (rows) => "\ufeff" + rows.map((row) => row.map(field).join(",") + "\r\n").join("");

function save(name, rows) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([csv(rows)], { type: "text/csv" }));
  link.download = name + ".csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

const shownRows = (table) => [...table.rows].filter((row) => !row.hidden).map((row) => [...row.cells].map(leaves));

function nameOf(table) {
  const summary = table.closest("details")?.querySelector("summary");
  const text = leaves(summary ?? table.closest("section").querySelector("h2"));
  return text.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60) || "table";
}

function searchBox(scope, label) {
  const box = document.createElement("input");
  box.type = "search";
  box.placeholder = box.ariaLabel = label;
  box.addEventListener("input", () => search(scope, box.value));
  return box;
}

function addTools(exports) {
  for (const scope of document.querySelectorAll(".searchable")) scope.prepend(searchBox(scope, "Search the claims"));
  for (const button of document.querySelectorAll("button[data-export]")) {
    const { names, rows } = exports[button.dataset.export];
    button.addEventListener("click", () => save(button.dataset.export, [names, ...rows]));
  }
  for (const wide of document.querySelectorAll(".wide")) {
    const table = wide.querySelector("table");
    if (table.classList.contains("forest") || table.closest(".searchable")) continue; // their numbers are the claims'
    const tools = document.createElement("div");
    tools.className = "tools";
    if (table.tBodies[0].rows.length > 5) tools.append(searchBox(wide, "Search this table"));
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "CSV";
    button.title = "Save the rows that are shown";
    button.addEventListener("click", () => save(nameOf(table), shownRows(table)));
    tools.append(button);
    wide.before(tools);
  }
}
