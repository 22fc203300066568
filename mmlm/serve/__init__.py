"""A model behind HTTP: OpenAI's chat completions, with methods (``mmlm serve``).

    app.py       the routes                       service.py   what a request goes through
    wire.py      what its body may hold           names.py     which methods it names
    pictures.py  where its pictures come from     prompts.py   the model's inputs, checked
    jobs.py      a request that waits             worker.py    the model's thread: batches
    rows.py      an answer while it grows         sampling.py  draws, for each row by itself
    bodies.py    bodies as they arrive            replies.py   answers as OpenAI writes them
    limits.py    what is taken                    refusals.py  what is said otherwise
    running.py   the server's life

Needs the extra ``serve`` (FastAPI and uvicorn).
"""
