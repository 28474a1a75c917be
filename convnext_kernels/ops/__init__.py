"""One folder per operator: its public function, reference, schema and gradient, kernels and configurations."""
