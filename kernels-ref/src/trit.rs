//! One ternary weight.

/// A weight of −1, 0 or +1.
///
/// Stored as the two-bit code `T + 1`, so that a kernel can use codes as unsigned numbers and subtract `Σa` once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(i8)]
pub enum Trit {
    /// −1, code 0.
    Minus = -1,
    /// 0, code 1.
    Zero = 0,
    /// +1, code 2.
    Plus = 1,
}

impl Trit {
    /// All three, in the order of their codes.
    pub const ALL: [Self; 3] = [Self::Minus, Self::Zero, Self::Plus];

    /// The weight of a two-bit code, or `None` for anything but 0, 1 and 2.
    #[must_use]
    pub const fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::Minus),
            1 => Some(Self::Zero),
            2 => Some(Self::Plus),
            _ => None,
        }
    }

    /// The two-bit code, `T + 1`.
    #[must_use]
    pub const fn code(self) -> u8 {
        (self as i8 + 1) as u8
    }

    /// The weight that `value` equals, or `None`.
    #[must_use]
    pub fn from_value(value: f32) -> Option<Self> {
        Self::ALL.into_iter().find(|trit| f32::from(*trit as i8) == value)
    }

    /// The weight as a number to multiply with.
    #[must_use]
    pub const fn value(self) -> i32 {
        self as i32
    }
}

#[cfg(test)]
mod tests {
    use super::Trit;

    #[test]
    fn codes_and_weights_are_inverse() {
        for trit in Trit::ALL {
            assert_eq!(Trit::from_code(trit.code()), Some(trit));
            assert_eq!(trit.value(), i32::from(trit.code()) - 1);
            assert_eq!(Trit::from_value(trit.value() as f32), Some(trit));
        }
        assert_eq!(Trit::from_code(3), None);
        assert_eq!(Trit::from_value(0.5), None);
    }
}
