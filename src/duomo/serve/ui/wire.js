// The wire: JSON and server-sent events over fetch, to the server this page came from and no other.

function headers(key) {
  const all = { "Content-Type": "application/json" };
  if (key) all.Authorization = `Bearer ${key}`;
  return all;
}

async function checked(response) {
  if (response.ok) return response;
  let message = `the server answered ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch { /* no envelope: the status must do */ }
  throw Object.assign(new Error(message), { status: response.status });
}

export async function models(key) {
  const response = await checked(await fetch("/v1/models", { headers: headers(key) }));
  return (await response.json()).data;
}

export async function control(id, action, key) {
  const body = JSON.stringify({ id, action });
  await checked(await fetch("/v1/chat/completions/control", { method: "POST", headers: headers(key), body }));
}

/** The chunks of a streamed chat completion; an error event becomes an exception. */
export async function* ask(body, key, signal) {
  const options = { method: "POST", headers: headers(key), body: JSON.stringify(body), signal };
  const response = await checked(await fetch("/v1/chat/completions", options));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      const data = event.split("\n").find((line) => line.startsWith("data: "))?.slice(6);
      if (!data || data === "[DONE]") continue; // comments keep the line warm
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}
