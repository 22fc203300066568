"""The one HTTP client of mmlm: servers that speak OpenAI's chat completions.

* `mmlm.chat_server.client`: many requests at once, with retries, waits and a pace (`ChatServer`).
* `mmlm.chat_server.wire`: addresses, keys, and what a server's answers mean.
* `mmlm.chat_server.options`: the options of a command that asks a server (`ServerOptions`).

Judges (`benchmarks.judges.http`) and generators (`data_tools.generators.openai`) are its users.
"""
