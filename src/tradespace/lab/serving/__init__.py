"""Load on an OpenAI-compatible server: a client that times what it gets, arrivals, figures, and the experiments on our own server. No torch in this process."""
