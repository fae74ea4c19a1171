"""The energy ledger: from segments to who used what, and the tables that say so."""
