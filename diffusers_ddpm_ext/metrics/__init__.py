"""Numbers about samples: distances to reference images, precision and coverage, copies of training images."""
