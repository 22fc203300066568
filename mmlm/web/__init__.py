"""The playground in a browser: what the model invents, why, and what each method does about it.

``mmlm web`` starts it. What stands where:

* the page: `app`, `theme`, ``web.css``; its tabs: `compare_tab`, `effects`, `data`;
* comparing, without a page: `compare` (a visitor's talk), `columns` (answers side by side), `gaze`
  (where the model looked), and their HTML: `answers`, `gaze_figures`;
* choosing: `method_forms` (fields of methods), `choosers` (the same on the page), `settings`
  (what a link carries);
* shared: `models` (what is loaded, and twins of it), `messages` (errors for people).

Everything that a page needs is served by this process: no font, script or picture comes from
elsewhere.
"""
