"""What a store from elsewhere may name and do: names, fingerprints, consent to code.  No torch."""
