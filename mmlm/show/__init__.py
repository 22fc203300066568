"""What people are shown about an answer, in the terminal, on a page and in the playground.

Words with verdicts (`words`), what is known to be in a picture (`truth`), conversations
(`conversation`), where the model looked (`looking`) and figures of it (`figures`). The interfaces
(`mmlm.cli`, `mmlm.web`) put these together; nothing here knows an interface.
"""
