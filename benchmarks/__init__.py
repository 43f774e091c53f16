"""What meshlb costs: ``python -m benchmarks`` prints it. The README quotes nothing that is not printed here."""
