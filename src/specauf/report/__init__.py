"""From one plain results dict to tables, figures and a self-contained page. Imports no torch.

`tables` makes rows, sentences and Markdown; `plots` makes figures; `page` reads results.json and writes the report.
"""
