// SPDX-License-Identifier: Apache-2.0
// A client's side of a console's socket: what is printed there comes out here, what is typed here goes there.
#pragma once

namespace vmm {

enum class Left { by_user, hung_up, output_gone };
enum class Typing { sent, only_to_leave };

// Until Ctrl-Q is typed or an end is gone; `input` may be -1. Neither side waits for the other: while 1 MiB of what was
// typed is not taken, a pipe is not read, and a terminal, whose Ctrl-Q has to be seen, loses what is typed beyond.
Left carry_console(int socket, int input, int output, Typing typing);

}  // namespace vmm
