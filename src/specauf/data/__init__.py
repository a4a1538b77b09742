"""From a chat corpus to tokens, loss masks and target features.

Read in this order: `sources` (records, repairs, the ledger, the split), `chat` (template and loss mask), `dataset`
(what is stored), `features` (an optional cache of the target's hidden states).
"""
