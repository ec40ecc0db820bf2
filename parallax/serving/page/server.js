// What the page asks of its server. Invariant: the key, where one is needed, is kept for this tab alone.

const KEY = "parallax-key";

export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

function headers() {
  const key = sessionStorage.getItem(KEY);
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

/** What /run says, or null where the key is missing or wrong. */
export async function describeRun() {
  const response = await fetch("run", { headers: headers() });
  if (response.status === 401) return null;
  if (!response.ok) throw new Error(await complaint(response));
  return response.json();
}

/** The chunks of a streamed completion, one choice each. Throws an Error with the server's words. */
export function complete(request, signal) {
  return stream("v1/completions", request, signal);
}

/** Those of an answer in a chat, alike. */
export function chat(request, signal) {
  return stream("v1/chat/completions", request, signal);
}

async function* stream(path, request, signal) {
  const response = await fetch(path, {
    method: "POST",
    headers: headers(),
    body: JSON.stringify({ ...request, stream: true }),
    signal,
  });
  if (!response.ok) throw new Error(await complaint(response));
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    yield chunk.choices[0];
  }
  throw new Error("the server went away in the middle of its answer");
}

/** The data of server-sent events, however the network cuts them. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) yield part.replace(/^data: /, "");
  }
}

async function complaint(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered with status ${response.status}`;
  }
}
