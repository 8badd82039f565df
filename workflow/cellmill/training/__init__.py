"""What training is made of: micro batches, ranks, precision, optimiser, saved state, log, meters and guards."""
