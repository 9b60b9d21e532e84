"""An OpenAI-compatible server. `app` speaks HTTP, `link` carries requests to the engine's own process, `worker` is that process. Thin over the library."""
