"""What several operators share: checks, layouts, registration, Triton's device functions and its matrix product."""
