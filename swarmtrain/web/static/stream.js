// Server-sent events, read with `fetch`: an `EventSource` could not send the key, nor say why a connection ended.

const FIRST_WAIT_MS = 500;
const LONGEST_WAIT_MS = 5000;
const SILENCE_MS = 40000;

/** Split what has arrived into messages; return [their JSON texts, the rest]. */
export function messages(text) {
  const parts = text.split("\n\n");
  const rest = parts.pop();
  const told = parts.map((part) =>
    part
      .split("\n")
      .filter((line) => line.startsWith("data: "))
      .map((line) => line.slice(6))
      .join("\n"),
  );
  return [told.filter(Boolean), rest];
}

/**
 * Follow `url` for good: `onMessage` gets each object, `onConnection` "open", "lost" or "refused". Whenever the connection
 * is lost it is made again.
 */
export async function follow(url, key, onMessage, onConnection) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  let wait = FIRST_WAIT_MS;
  for (;;) {
    const abort = new AbortController();
    let timer = setTimeout(() => abort.abort(), SILENCE_MS);
    try {
      const response = await fetch(url, { headers, cache: "no-store", signal: abort.signal });
      if (!response.ok) {
        onConnection("refused", (await response.text()).trim());
      } else {
        onConnection("open", "");
        wait = FIRST_WAIT_MS;
        const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
        for (let rest = ""; ; ) {
          const { done, value } = await reader.read();
          if (done) break;
          clearTimeout(timer);
          timer = setTimeout(() => abort.abort(), SILENCE_MS);
          const [texts, after] = messages(rest + value);
          rest = after;
          texts.forEach((text) => onMessage(JSON.parse(text)));
        }
        onConnection("lost", "");
      }
    } catch {
      onConnection("lost", "");
    }
    clearTimeout(timer);
    abort.abort();
    await new Promise((resolve) => setTimeout(resolve, wait));
    wait = Math.min(LONGEST_WAIT_MS, 2 * wait);
  }
}
