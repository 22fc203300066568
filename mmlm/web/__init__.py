"""The playground in a browser: what the model invents, why, and what each method does about it.

``mmlm web`` starts it. One file per part: `app` (the page), `compare`, `effects` and `data` (its
tabs), `models` (what is loaded, and twins of it), `method_forms` (forms made from the methods'
fields), `settings` (what a link carries), `answers` and `gaze` (answers, and where the model
looked, as HTML), `messages` (errors for people), `theme`. Everything it needs is served by this
process: no fonts, scripts or pictures from elsewhere.
"""
