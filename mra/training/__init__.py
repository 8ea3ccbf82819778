"""Parts of training that depend on neither loop nor model: data, transforms, masking, optimisation."""
