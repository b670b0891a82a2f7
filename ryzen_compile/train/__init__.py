"""Training what compression has made coarse, with the model's own predictions as the teacher."""
