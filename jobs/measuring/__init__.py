"""What several measurements need: their records, processes of their own, stand-ins, one Ray head, one GPU."""
