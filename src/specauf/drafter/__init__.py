"""Block drafters: architecture, configuration and the checkpoint layout that serving engines read."""
