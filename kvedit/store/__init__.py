"""The store on disk: database, journal, revisions, integrity check and HTML report.  No torch."""
