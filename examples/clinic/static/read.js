// What both pages share. Text from records only ever becomes text, never markup.

export async function read(url) {
  const answer = await fetch(url, { headers: { accept: "application/json, application/fhir+json" } });
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok) {
    const words = body.issue?.[0]?.diagnostics ?? body.detail ?? body.error ?? body.title ?? "";
    throw new Error(`This could not be read (${answer.status}). ${words}`.trim());
  }
  return body;
}

export function resources(bundle, type) {
  return (bundle.entry ?? []).map((entry) => entry.resource).filter((found) => found?.resourceType === type);
}

export function nameOf(person) {
  const name = Array.isArray(person.name) ? person.name[0] : undefined;
  return name ? [...(name.given ?? []), name.family].filter(Boolean).join(" ") : "(name not shown)";
}

export function element(tag, text, attributes = {}) {
  const made = Object.assign(document.createElement(tag), attributes);
  made.textContent = text;
  return made;
}
