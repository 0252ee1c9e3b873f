"""The store on disk: database, journal, integrity, and the page about it.  No torch."""
