import { element, nameOf, read, resources } from "./read.js";

const state = document.getElementById("state");
try {
  const people = resources(await read("/fhir/Patient?_count=200"), "Patient");
  const rows = people.map((person) => {
    const row = document.createElement("tr");
    const link = element("a", "Open", { href: `/patients/${encodeURIComponent(person.id)}` });
    const cell = document.createElement("td");
    cell.append(link);
    row.append(element("td", nameOf(person)), element("td", String(person.birthDate ?? "–")), cell);
    return row;
  });
  document.querySelector("tbody").append(...rows);
  document.querySelector("table").hidden = false;
  state.textContent = people.length === 1 ? "1 patient" : `${people.length} patients`;
} catch (error) {
  state.textContent = error.message;
}
