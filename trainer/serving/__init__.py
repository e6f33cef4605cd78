"""The HTTP server of `spiketrain serve`: OpenAI's completions and chat completions over the generation engine.

protocol reads and checks the JSON of a request. service turns it into tokens and submits it to scheduler, the thread
that owns the engine. choices makes text of the tokens that come back, answers makes JSON of that, app sends it. server
has the sockets and signals.
"""
