"""log p(x) with its error: importance sampling and its diagnostics."""
