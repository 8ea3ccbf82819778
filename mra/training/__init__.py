"""Parts of training that know neither the loop nor the model: data, transforms, masking, optimisation."""
