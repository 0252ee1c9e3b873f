"""One module a family of commands; `kvedit.cli` puts them together."""
