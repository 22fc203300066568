"""Benchmarks whose questions are about several pictures: MMMU, BLINK, Mantis-Eval, NLVR2, MVBench.

One module each with the same functions: ``read_questions`` (the official files, from this disk),
``task`` (the requests) and ``score_stored`` (the numbers, from stored lines alone); where the
authors' evaluation reads a file of answers, ``write_official`` and ``read_official`` as well.

Answers are greedy unless asked otherwise, also where lmms-eval samples (Mantis-Eval, temperature
0.2). The unit of the bootstrap is the first picture: questions that show the same one are drawn
together.
"""

__all__: list[str] = []
