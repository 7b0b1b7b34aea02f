import { element, nameOf, read, resources } from "./read.js";

const id = encodeURIComponent(decodeURIComponent(location.pathname.split("/").pop()));

async function fill(list, lines) {
  const target = document.getElementById(list);
  try {
    const found = await lines();
    target.replaceChildren(...(found.length ? found : ["None."]).map((line) => element("li", line)));
  } catch (error) {
    target.replaceChildren(element("li", error.message));
  }
}

function words(concept) {
  return concept?.text ?? concept?.coding?.[0]?.display ?? "(not shown)";
}

function measured(observation) {
  const parts = observation.component ?? [observation];
  const values = parts.map((part) => part.valueQuantity?.value ?? "–").join(" / ");
  const unit = parts[0].valueQuantity?.unit ?? "";
  return `${words(observation.code)}: ${values} ${unit}`.trim();
}

async function head() {
  const born = document.getElementById("born");
  try {
    const person = await read(`/fhir/Patient/${id}`);
    document.getElementById("name").textContent = nameOf(person);
    born.textContent = `Born ${person.birthDate ?? "–"}`;
  } catch (error) {
    born.textContent = error.message;
  }
}

function moods() {
  return fill("moods", async () => {
    const { entries } = await read(`/api/moods/${id}`);
    return entries.map(({ at, mood, note }) => `${at.slice(0, 10)}  ${mood} of 10  ${note ?? ""}`);
  });
}

document.getElementById("write").addEventListener("submit", async (event) => {
  event.preventDefault();
  const form = event.target;
  const said = form.querySelector("output");
  const answer = await fetch(`/api/moods/${id}`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ mood: form.mood.valueAsNumber, note: form.note.value }),
  });
  said.textContent = answer.ok ? "Written." : `This could not be written (${answer.status}).`;
  if (answer.ok) {
    form.reset();
    await moods();
  }
});

await Promise.all([
  head(),
  fill("conditions", async () =>
    resources(await read(`/fhir/Condition?patient=${id}`), "Condition").map((one) => words(one.code))),
  fill("observations", async () =>
    resources(await read(`/fhir/Observation?patient=${id}&_sort=-date`), "Observation").map(measured)),
  moods(),
]);
